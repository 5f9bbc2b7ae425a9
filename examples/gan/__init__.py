"""What the three GAN examples share: digits, files, pictures and a measure of quality; it imports no framework."""
