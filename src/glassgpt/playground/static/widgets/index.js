// Everything in this folder, in one import.
export * from './bar_list.js';
export * from './bars.js';
export * from './chart.js';
export * from './figure.js';
export * from './head_grid.js';
export * from './head_matrix.js';
export * from './lens_grid.js';
export * from './matrix.js';
export * from './point_map.js';
export * from './scrubber.js';
export * from './sweep.js';
export * from './switch_grid.js';
export * from './token_strip.js';
export * from './track_field.js';
export * from './vector.js';
