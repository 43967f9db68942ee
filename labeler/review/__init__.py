"""`rlaif review`: people look at a labelled dataset in a browser and mark what they prefer."""
