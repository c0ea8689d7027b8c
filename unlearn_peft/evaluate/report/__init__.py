"""An evaluation -> a page, a section of a model card, a table in the terminal."""
