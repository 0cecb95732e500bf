"""The training job around the layers: whose weight is this, replicas, one norm, checkpoints, optimizers."""
