"""From prompts, images and videos to a video: the sampler of one chunk and the loop over chunks."""
