"""Who must have what forgotten: in YAML or a database."""
