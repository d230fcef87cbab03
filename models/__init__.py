"""The model shipped with the repository (millpond) and the code that makes it (training)."""
