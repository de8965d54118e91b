export const title = "Flow";

export function mount(root, context) {
  return { update() {}, unmount() {} };
}
