"""From a published list of urls to a report beside the published numbers, in stages that are done once."""
