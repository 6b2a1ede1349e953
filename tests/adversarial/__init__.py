"""Random denoisers, harmful and harmless, that the engine must serve right whatever it decides."""
