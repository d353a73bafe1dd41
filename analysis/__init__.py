"""Analysis: datasets and laws in, datasets or numbers out. Nothing here simulates."""
