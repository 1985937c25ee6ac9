"""From a parent to a Hugging Face folder: the writers of each format, and the checked description that readers share."""
