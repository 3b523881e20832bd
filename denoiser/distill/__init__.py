"""Fine-tune a backbone so that its own tokens are clean (stage three, distillation)."""
