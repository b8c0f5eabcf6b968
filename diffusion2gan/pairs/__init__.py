"""(z, c, x): the noise, the prompt and the end of the teacher's ODE trajectory; how they are made, kept and read."""
