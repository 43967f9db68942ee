"""What a policy is worth beside another one: win rates, length-controlled too, and reward against KL."""
