"""The method itself: Gaussian-augmented attention and patch representation refinement."""
