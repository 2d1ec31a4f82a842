"""Joint targets from features of one partial denoiser pass: resampler and diffusion action head, as in WorldArena's planner."""
