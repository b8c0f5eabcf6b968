"""D(c, z, x) of paper section 3.3: the teacher's network as a conditional multi-scale discriminator, and its regularisation."""
