"""MatQuant with OmniQuant as its base algorithm: the range of each group, trained block by block."""
