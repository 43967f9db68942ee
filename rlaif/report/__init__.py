"""HTML pages that need nothing but themselves: the look that all of them share, and `rlaif report`."""
