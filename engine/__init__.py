"""What every training program needs once: config, launch, run folder, checkpoints, progress, trackers."""
