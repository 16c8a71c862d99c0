"""Engine, configuration, checkpoints and the other things that are not the method itself."""
