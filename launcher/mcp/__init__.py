"""`launcher mcp`: what commands do, as tools for agents, over the Model Context Protocol."""
