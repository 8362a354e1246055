"""Where images and gaze come from: one small module per public layout."""
