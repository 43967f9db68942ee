"""What can score: a learned reward model, or a judge that scores directly. Both behind `base.Scorer`."""
