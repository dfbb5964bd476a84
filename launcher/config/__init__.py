"""One YAML file and overrides become a checked RunSpec, with file and line in every error."""
