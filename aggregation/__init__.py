"""Pure maths on LoRA factors: stacking, recompression, verification."""
