"""Zero-shot subject-driven video generation (arXiv 2504.17816), trained and sampled from scratch.

One legend for every file:
    B batch   C channels   T frames   H W rows and columns   L tokens   D width   N heads   K head width
    video     noisy or clean latents (B, C, T, H, W)      ref    one clean latent frame (B, C, 1, H, W)
    clip      pixels (B, 3, T, H, W) in [-1, 1]           text   encoded prompts (B, L, D)
    t         diffusion time (B,)                         pred   the network's output; target its true value
"""

__version__ = "0.1.0"
