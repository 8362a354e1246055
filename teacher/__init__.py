"""The teacher: a saliency model trained on human gaze, which then labels image sets for the students."""
