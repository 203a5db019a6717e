"""Post-training by rewards: reward models, PPO, DPO and best-of-n."""
