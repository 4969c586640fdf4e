"""`make demo`: the main job on one machine, from a pulled cable to a restored backup."""
