"""A subject's name -> a recipe folder, an adapter, and a page that says what is forgotten and what changed nearby."""
