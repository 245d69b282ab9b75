"""What scores images: `judge.score(kind, outputs, target) -> {name: float32 [B]}`, its mix, the energy distance."""
