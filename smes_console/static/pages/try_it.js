export const title = "Try it";

export function mount(root, context) {
  return { update() {}, unmount() {} };
}
