"""Post-training by rewards: reward models, PPO, GRPO, DPO and best-of-n."""
