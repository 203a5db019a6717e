"""The commands of `python -m jaxgpt`, one module each."""
