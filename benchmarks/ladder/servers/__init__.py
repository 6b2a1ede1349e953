"""The contestants' servers. They import nothing of Stepweave, and run in any environment that has
torch, diffusers and their own packages."""
