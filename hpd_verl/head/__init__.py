"""Output layer, sampled tokens, objective and gradients in one sweep over tokens. Imports torch and objectives only."""
