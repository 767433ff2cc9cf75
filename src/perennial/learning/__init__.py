"""One gradient step: objectives, one file each, and the loop over a stage's iterations."""
