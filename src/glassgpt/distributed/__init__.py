"""Several processes that train one model. Only this folder uses `torch.distributed`."""
