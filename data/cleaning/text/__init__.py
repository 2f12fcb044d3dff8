"""What is done with single texts: mend, mask, cut and measure them."""
