"""`rlaif export`: a labelled dataset in the shapes that trainers read, in files or on the hub."""
