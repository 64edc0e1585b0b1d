"""Training a LoRA: pictures become latents once, then a small change of each block is learned."""
