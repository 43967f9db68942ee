"""Online PPO and online / iterative DPO against a reward server."""
