"""`igpt studio`: a page on one's own machine on which pictures are drawn, edited and learned from. Needs Gradio."""
