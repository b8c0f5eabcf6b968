"""The small real text-to-image teacher that ships with the package, and how it was made.

Nothing after `teachers/` knows that it exists: it is an ordinary `StableDiffusionPipeline` folder.
"""
