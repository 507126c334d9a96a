"""Planning: sizes, recipes, designs and costs. From a few options to a `Plan`; trains nothing, imports no torch."""
