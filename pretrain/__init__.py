"""The student: contrastive or supervised pretraining with an extra head that predicts where people look."""
