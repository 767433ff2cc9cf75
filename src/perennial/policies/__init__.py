"""Who acts: vision-language-action policies, one file each."""
