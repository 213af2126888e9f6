int kvkeep_placeholder;
