"""The jobs from Python: as the commands, with models and data that the caller may have made."""
