"""From what a user names (timm, the Hub, folders, files) to a model with its weights."""
