"""The child process that owns torch, the model and the device."""
