"""From a batch to the student's loss: in one pass, or in verl's stages."""
