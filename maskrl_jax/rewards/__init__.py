"""What scores images: `score(images [B,H,W,3] float32 in [0,1], prompts) -> [B] float32`."""
